"""Datasets of the Hugging Face hub: `hf:NAME[:CONFIG][:SPLIT]`, whose parquet files are downloaded into its cache once."""

from pathlib import Path

from common.errors import DATA, UserError

PREFIX = "hf:"
CONVERTED = "refs/convert/parquet"
"""The branch of a dataset in which the hub keeps its parquet version, as CONFIG/SPLIT/0000.parquet."""
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "test")}


def hub_files(source: str, kind: str = "train") -> list[Path]:
    """The parquet files of a dataset, downloaded if they are not in the cache.

    CONFIG is a folder or a configuration of the dataset. SPLIT, if it is given, is all that is read; else the files of kind
    `validation` are those of its validation or test split, if there is one.

    Raises `UserError` (3): there is no such dataset, configuration, split, network or package.
    """
    name, config, split = [*source.removeprefix(PREFIX).split(":"), "", ""][:3]
    if config in ("train", "validation", "test") and not split:
        config, split = "", config
    try:
        from huggingface_hub import hf_hub_download, list_repo_files
    except ImportError as error:
        raise UserError(f"{source} is fetched with huggingface-hub: pip install huggingface-hub", DATA) from error
    try:
        for revision in (None, CONVERTED):
            names = [n for n in list_repo_files(name, repo_type="dataset", revision=revision) if n.endswith(".parquet")]
            inside = sorted(n for n in names if not config or n.startswith(f"{config}/"))
            if train := [n for n in inside if _is_of(n, (split,) if split else SPLITS["train"])]:
                files = train if kind == "train" else [n for n in inside if not split and _is_of(n, SPLITS[kind])]
                return [Path(hf_hub_download(name, file, repo_type="dataset", revision=revision)) for file in files]
    except Exception as error:  # of httpx and of the hub, which has a dozen kinds
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{source} cannot be fetched from the hub: {reason}", DATA) from error
    folders = ", ".join(sorted({str(Path(n).parent) for n in names})[:12]) or "none"
    raise UserError(
        f"{source}: no parquet files of that configuration and split; the dataset has the folders {folders}", DATA
    )


def _is_of(file: str, splits: tuple[str, ...]) -> bool:
    """Whether a file is of one of the splits, by its folder or its name: `data/train-00000-of-00004.parquet`."""
    words = file.replace("partial-", "").replace("-", "/").replace(".", "/").replace("_", "/").split("/")
    named = {split for group in SPLITS.values() for split in group} & set(words)
    return bool(named & set(splits)) or (not named and "train" in splits)
