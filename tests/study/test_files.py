import json
import shlex
import shutil
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.study.corpus import check_made_with
from s2train.study.files import Folders, check_corpus, check_data, check_same_split, record_split
from s2train.study.settings import data_commands


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders(tmp_path, Path("launch"))
    made.corpus.mkdir()
    made.train_text.write_text('{"text": "a"}\n')
    made.held_out_text.write_text('{"text": "b"}\n')
    (made.corpus / "corpus.json").write_text(json.dumps({"held_out": ["fs"]}))
    return made


def test_an_empty_held_out_split_is_rejected(folders: Folders) -> None:
    folders.held_out_text.write_text("")
    with pytest.raises(ConfigError, match=r"held-out\.jsonl is empty"):
        check_corpus(folders)


def test_a_missing_corpus_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"quality_study\.py data --tree TREE --root {tmp_path}"):
        check_corpus(Folders(tmp_path, Path("launch")))


def test_a_command_of_an_error_names_a_root_with_spaces_as_a_shell_reads_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_corpus(Folders(tmp_path / "my study", Path("launch")))
    assert shlex.split(error.value.remedy)[-2:] == ["--root", str(tmp_path / "my study")]


def test_a_tokenizer_of_another_split_is_rejected(folders: Folders) -> None:
    record_split(folders)
    check_same_split(folders)
    (folders.corpus / "corpus.json").write_text(json.dumps({"held_out": ["net"]}))
    with pytest.raises(ConfigError, match="trained on another split"):
        check_same_split(folders)


@pytest.mark.parametrize("content", ["", "[1]", '{"settings": 1}'])
def test_a_damaged_description_of_the_corpus_is_named(folders: Folders, content: str) -> None:
    record_split(folders)
    (folders.data / "corpus.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data/corpus\.json: describes no corpus .*run `data` again"):
        check_same_split(folders)
    folders.corpus.joinpath("corpus.json").write_text(content)
    with pytest.raises(ConfigError, match=r"corpus/corpus\.json: describes no corpus"):
        check_made_with(folders, None, [])


def test_the_same_split_may_be_made_in_another_folder(folders: Folders) -> None:
    here, there = ({"held_out": ["fs"], "settings": {"depth": 2, "tree": name, "output": name}} for name in "ab")
    (folders.corpus / "corpus.json").write_text(json.dumps(here))
    record_split(folders)
    (folders.corpus / "corpus.json").write_text(json.dumps(there))
    check_same_split(folders)
    (folders.corpus / "corpus.json").write_text(json.dumps(there | {"settings": {"depth": 3}}))
    with pytest.raises(ConfigError, match="trained on another split"):
        check_same_split(folders)


def test_training_needs_no_text_beside_the_tokenized_splits(folders: Folders) -> None:
    record_split(folders)
    for prefix in (folders.train_data, folders.held_out_data):
        prefix.with_name(prefix.name + ".idx").touch()
    folders.tokenizer.touch()
    shutil.rmtree(folders.corpus)
    check_data(folders)


def test_data_without_their_tokenizer_are_rejected(folders: Folders) -> None:
    record_split(folders)
    for prefix in (folders.train_data, folders.held_out_data):
        prefix.with_name(prefix.name + ".idx").touch()
    with pytest.raises(ConfigError, match=r"train-tokenizer\.json is missing.*Copy it back"):
        check_data(folders)


def test_a_tokenizer_that_is_there_is_used(folders: Folders) -> None:
    assert [command[-2] for _, command in data_commands(folders)] == [
        "tokenizer=bpe:32768",
        f"tokenizer={folders.tokenizer}",
    ]
    folders.data.mkdir()
    folders.tokenizer.touch()
    assert {command[-2] for _, command in data_commands(folders)} == {f"tokenizer={folders.tokenizer}"}


def test_training_without_tokenized_data_is_rejected(folders: Folders) -> None:
    record_split(folders)
    with pytest.raises(ConfigError, match=r"train\.idx is missing.*quality_study\.py data"):
        check_data(folders)
