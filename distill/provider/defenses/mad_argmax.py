from __future__ import annotations

import torch

from distill.provider.defenses.mad import MAD, cosine, parts

EXACT = 10  # up to so many classes all subsets are compared
TIE_BREAK = 1e-5  # what the label's entry gets before normalising


class MADArgmax(MAD):
    """MAD that keeps the label: it moves towards the worst answer that is uniform on a set of classes with the label.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks (Orekondy, Schiele and Fritz, ICLR
    2020), equations 3 to 7 and "MAD-argmax": the vertices of the answers whose largest entry is the label's are the
    uniform vectors on the 2^(K-1) sets that hold it. All are compared for K ≤ 10. Above, as in the paper, the set grows
    from the label by the class that makes the angle largest; it grows to all classes and the best set on the way is
    taken. The label's entry gets 1e-5 before normalising, so that it stays the largest.

    Threat model: as `MAD`, and it costs honest users no accuracy; an attacker who takes the top-1 label undoes it.
    (n, classes) posteriors in and out; the query information, the degenerate rows and the options are those of `MAD`.
    """

    keeps_argmax = True

    def _vertices(self, posteriors: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
        labels = posteriors.argmax(dim=1, keepdim=True)
        along, squared = parts(posteriors, surrogate)
        choose = enumerated if posteriors.shape[1] <= EXACT else grown
        chosen = choose(along, squared, labels).to(posteriors)
        chosen.scatter_add_(1, labels, torch.full_like(chosen[:, :1], TIE_BREAK))
        return chosen / chosen.sum(dim=1, keepdim=True)


def enumerated(along: torch.Tensor, squared: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, classes) bool: of all sets that hold the label, the one with the smallest cosine."""
    places = torch.arange(along.shape[1] - 1, device=along.device)
    others = places + (places >= labels)  # (n, classes - 1), the classes without the label
    total, norm = along.gather(1, labels), 1 + squared.gather(1, labels)
    size = torch.ones(1, dtype=along.dtype, device=along.device)
    for other in others.split(1, dim=1):  # twice as many sets with each class: set i holds it where its bit in i is set
        total = torch.cat([total, total + along.gather(1, other)], dim=1)
        norm = torch.cat([norm, norm + squared.gather(1, other)], dim=1)
        size = torch.cat([size, size + 1])
    best = cosine(total, norm, size).argmin(dim=1, keepdim=True)
    return torch.ones_like(along, dtype=torch.bool).scatter(1, others, (best >> places & 1).bool())


def grown(along: torch.Tensor, squared: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, classes) bool: the best of the sets that grow from the label by the best class at each step."""
    total, norm = along.gather(1, labels), 1 + squared.gather(1, labels)
    members = torch.zeros_like(along, dtype=torch.bool).scatter(1, labels, True)
    best, chosen = cosine(total, norm, 1), members.clone()
    candidates = squared.scatter(1, labels, -torch.inf)  # `cosine` is infinite for a class that has joined
    for size in range(2, along.shape[1] + 1):
        found, joins = cosine(total + along, norm + candidates, size).min(dim=1, keepdim=True)
        total, norm = total + along.gather(1, joins), norm + squared.gather(1, joins)
        members.scatter_(1, joins, True)
        candidates.scatter_(1, joins, -torch.inf)
        best, chosen = torch.minimum(best, found), torch.where(found < best, members, chosen)
    return chosen
