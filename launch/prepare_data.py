"""Tokenize text files into a Megatron indexed dataset.

python launch/prepare_data.py 'input=[a.txt,b.jsonl]' output=runs/data/mine tokenizer=bytes
"""

import warnings

import hydra
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

warnings.filterwarnings(
    "ignore", module="megatron"
)  # tells of transformer-engine and apex, which play no part here

from s2train.config import to_object  # noqa: E402
from s2train.data.prepare import PrepareConfig, prepare, register  # noqa: E402
from s2train.errors import ConfigError  # noqa: E402

register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    try:
        settings: PrepareConfig = to_object(cfg)
        made = prepare(settings)
    except (ConfigError, MissingMandatoryValue) as error:
        raise SystemExit(f"error: {str(error).splitlines()[0]}") from None
    print(
        f"{settings.output}: {made.documents:,} documents, {made.tokens:,} tokens of {made.vocab_size:,} ids "
        f"({made.tokenizer}), unigram entropy {made.unigram_entropy:.4f} nats per token"
    )


if __name__ == "__main__":
    main()
