"""Trains small networks in however many processes it is started in; the main one writes losses and weights.

torchrun --nproc_per_node 2 tests/distributed_fit.py OUT.pt

`accelerate launch --cpu --num_processes 2` would start one process: on CPU it leaves the rest to mpirun.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from distill.objectives.soft_cross_entropy import SoftCrossEntropy
from distill.records import InputSpec, TransferSet
from distill.students.mlp import MLP
from distill.students.resnet import ResNet
from distill.training import Recipe, Trainer


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rows = []
    # "auto" must find the other process too; on a machine with one GPU it would give that to both.
    trainer = Trainer(device="cpu" if torch.accelerator.is_available() else "auto", log=rows.append)
    rng = np.random.default_rng(0)
    targets = SoftCrossEntropy().prepare(TransferSet(np.arange(23), rng.dirichlet([0.3] * 4, 23).astype(np.float32)))
    table = rng.normal(size=(23, 5)).astype(np.float32) * 10.0 ** np.arange(-2, 3, dtype=np.float32)
    images = rng.integers(0, 256, (23, 8, 8, 1), dtype=np.uint8)
    found = {"processes": trainer.processes, "weights": []}
    for student, inputs, spec in (
        (MLP(hidden=(16,)), table, InputSpec("table", (5,))),
        (ResNet(depth=8, width=4, norm="group"), images, InputSpec("image", (8, 8, 1))),
    ):
        # 20 training rows in batches of 7, 7 and 6; with micro-batches of 2 a process has pieces without rows. In the
        # last recipe each last batch is one row, so the second process has none at all.
        for batch_size, micro_batch_size in ((7, None), (7, 2), (19, None)):
            recipe = Recipe(
                epochs=3,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                optimizer="sgd",
                lr=0.05,
                gradient_clip=5.0,
                validation_share=0.13,
                selection="best",
                log_steps=1,
            )
            module = trainer.build(student, spec, 4, seed=0)
            name = f"{type(student).__name__}-{batch_size}-{micro_batch_size}"
            trainer.fit(
                module,
                student.encode(inputs, spec),
                targets,
                SoftCrossEntropy(),
                recipe,
                seed=3,
                name=name.split("-")[0],
            )
            found["weights"].append({key: value.clone() for key, value in module.state_dict().items()})
    answers = [trainer.broadcast(f"from {trainer.is_main}"), trainer.is_main]
    trainer.wait()
    if not trainer.is_main:
        assert answers == ["from True", False]
        assert rows == []
    else:
        torch.save({**found, "rows": rows}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
