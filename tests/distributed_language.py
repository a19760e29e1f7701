"""Trains a tiny language model in however many processes it is started in; the main one writes losses and weights.

torchrun --nproc_per_node 2 tests/distributed_language.py OUT.pt
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tiny_language import Local, answered, characters, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distill.language_training import LanguageModule, TeacherSignal, fit_language_student
from distill.objectives.sequence_kd import SequenceKD
from distill.objectives.token_jsd import TokenJSD
from distill.packing import encode, pack
from distill.students.llama import Llama
from distill.training import Recipe, Trainer


def sharded(tokenizer: object) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch where FSDP2 shards every layer and, at the root, embedding and output matrix."""
    packed = pack(encode(answered(30, weights=np.linspace(0.5, 2, 30)), tokenizer), 48)
    tensors = {name: torch.from_numpy(column) for name, column in packed.columns().items()}
    module = LanguageModule(network(len(tokenizer), tie_word_embeddings=True), SequenceKD())
    if torch.distributed.is_initialized():
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in module.network.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    loss = module(**tensors)
    loss.backward()
    found = {}
    for name, parameter in module.network.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if torch.distributed.is_initialized() else gradient
    return loss.item(), found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rows = []
    trainer = Trainer(device="cpu" if torch.accelerator.is_available() else "auto", log=rows.append, progress=False)
    tokenizer = characters()
    teacher = Local(network(len(tokenizer), seed=1), tokenizer)
    student = Llama(width=16, layers=2, heads=2, kv_heads=1, initializer_range=0.1)
    synthetic = answered(60, ids=tokenizer, weights=np.tile([0.5, 1, 2], 20))
    found = {"processes": trainer.processes, "weights": []}
    for signal, objective in ((None, SequenceKD()), (TeacherSignal(teacher, synthetic), TokenJSD())):
        # With micro-batches of 2, the last batch leaves a process with a piece without rows.
        for micro_batch_size in (None, 2):
            recipe = Recipe(
                epochs=2,
                batch_size=7,
                micro_batch_size=micro_batch_size,
                optimizer="sgd",
                lr=0.05,
                gradient_clip=5.0,
                validation_share=0.13,
                log_steps=1,
            )
            fitted, history = fit_language_student(
                trainer,
                student,
                synthetic,
                objective,
                recipe,
                signal=signal,
                teachers=tokenizer,
                max_length=48,
                seed=3,
                name="student",
            )
            found["weights"].append({key: value.clone() for key, value in fitted.state_dict().items()})
    found["packing"] = history["packing"]
    found["sharded"] = sharded(tokenizer)
    trainer.wait()
    if trainer.is_main:
        torch.save({**found, "rows": rows}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
