"""A point as one of several ranks computes it: torchrun --nproc-per-node N tests/pipeline/one_rank.py CONFIG.json"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from gqa_exp.config import Config
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import run_point, store_of


def main() -> None:
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    assert isinstance(config, Config)
    run_point(config, Plan([config], store_of(config)))


if __name__ == "__main__":
    main()
