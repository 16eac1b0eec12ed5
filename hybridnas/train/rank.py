"""One rank of a training on several devices of this host: the process that ``distributed.start`` starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hybridnas.arch.arch import Arch
from hybridnas.data import open_source, source_config
from hybridnas.train.config import TrainConfig
from hybridnas.train.distributed import Ranks, meet, own_device
from hybridnas.train.loop import follow


def main() -> int:
    """Read the job from standard input, join the other ranks, train along, leave."""
    job = json.load(sys.stdin)
    config = TrainConfig.from_dict(job["train"])
    device = own_device(torch.device(job["device"]), job["rank"])
    meeting = Path(job["meeting"])
    (meeting / str(job["rank"])).touch()
    meet(meeting, device, job["rank"], config.devices)
    ranks = Ranks(device)
    follow(
        Arch.from_dict(job["arch"]),
        open_source(source_config(job["data"])),
        config,
        folder=None if job["folder"] is None else Path(job["folder"]),
        device=device,
        impl=job["impl"],
        group=ranks,
    )
    ranks.leave()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
