from __future__ import annotations

from dataclasses import replace

from distill import contracts, records
from distill.data.pools.fitting import fit
from distill.errors import DistillError


class Dataset:
    """The training rows of another data set, as an out-of-distribution pool.

    Threat model: the attacker has public data of another kind. Pictures are cropped, resized and recoloured to the
    victim's; texts are taken as they are; tables must have as many features. Labels keep the source's own classes.

    Args:
        source: Any option of the group data: ``pool=dataset +data@pool.source=digits``.
    """

    def __init__(self, source: contracts.Data) -> None:
        if source is None or isinstance(source, (str, dict, list)):
            raise DistillError(f"source is an option of the group data (+data@pool.source=digits), not {source!r}")
        self.source = source

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises whatever the source raises, and `DistillError` where its rows don't fit the victim."""
        try:
            rows = self.source.load().train
        except DistillError as error:
            # The source speaks of "data"; here it lies under "pool.source".
            key = error.key or "data"
            message = str(error).removeprefix(f"{key}: ").replace("data.", "pool.source.")
            raise type(error)(message, "pool.source" + key.removeprefix("data")) from error
        return fit(replace(rows, name=f"dataset/{rows.name}"), data.spec, "pool.source")
