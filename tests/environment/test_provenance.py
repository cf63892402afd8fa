"""Files of results say what made them."""

from datetime import datetime, timedelta

import torch

from s2train.environment.provenance import timed_on


def test_a_file_of_timings_begins_with_date_command_device_and_versions() -> None:
    head = timed_on("inference.decode_speed", ["+model=tiny_hybrid", "a b"], torch.device("cpu"), ("absent-package",))
    assert list(head) == ["date", "command", "device", "versions"]
    assert abs(datetime.fromisoformat(head["date"]) - datetime.now().astimezone()) < timedelta(minutes=1)
    assert head["command"] == "python -m s2train.inference.decode_speed +model=tiny_hybrid 'a b'"
    assert head["device"] == "CPU"
    assert head["versions"]["torch"] == torch.__version__
    assert head["versions"]["absent-package"] is None


def test_a_program_without_arguments_names_none() -> None:
    assert timed_on("inference.decode_speed", [], torch.device("cpu"))["command"].endswith(".decode_speed")
