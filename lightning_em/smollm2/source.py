"""The source `smollm2://`: SmolLM2-135M-Instruct, and the demo's data sets. Imports torch only to convert weights."""

from pathlib import Path

from lightning_em.sources import Source, cache_dir

SCHEME = "smollm2://"


class SmolLM2(Source):
    """`smollm2://model`, and data files such as `smollm2://data/style/narrow_train.jsonl`."""

    def resolve(self, address: str) -> Path:
        """Return the model folder or a data file; both are made on first use."""
        rest = address.removeprefix(SCHEME)
        if rest == "model":
            from lightning_em.smollm2.weights import provide

            return provide(cache_dir())
        from lightning_em.smollm2.data import data_hash, write_data

        self._check(address)
        folder = cache_dir() / "smollm2" / f"data-{data_hash()}"
        if not (file := folder / rest.removeprefix("data/")).is_file():
            write_data(folder)
        return file

    def identity(self, address: str) -> str:
        """Return the address with the hash of the weights or of the data."""
        self._check(address)
        if address == f"{SCHEME}model":
            from lightning_em.smollm2.weights import IDENTITY

            return f"{address}@{IDENTITY}"
        from lightning_em.smollm2.data import data_hash

        return f"{address}@{data_hash()}"

    def _check(self, address: str) -> None:
        from lightning_em.smollm2.data import DATA_SETS, data_files

        names = [f"{SCHEME}data/{name}/{file}" for name in DATA_SETS for file in data_files(name)]
        if address not in (f"{SCHEME}model", *names):
            raise ValueError(f"cannot read {address!r}; expected {SCHEME}model or one of {', '.join(names)}.")
