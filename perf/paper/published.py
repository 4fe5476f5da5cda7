"""Published: what the TokenWeave paper measured, a few figures of it, and all of them where its CSV files are at hand.

A figure's unit: 1 is a share of the step, 4 and 10 microseconds, 11 milliseconds, 12 and 13 tokens/s, prompts included.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = (
    "TokenWeave (arXiv 2505.11329, MLSys 2026), from the CSV files of its artifact (github microsoft/tokenweave, "
    "artifact/csvs at commit f483d1c), rounded: 8 or 4 of 8 H100 SXM, bf16, eager, its baseline torch's multimem "
    "all-reduce. Figure 1 here is figure 11's (baseline - no all-reduce) / baseline"
)
MODES = {"baseline_multimem": "off", "no_ar": "nocomm", "overlap_fused": "weave"}  # column -> our mode
LLAMA, QWEN, MIXTRAL = "Llama-3.3-70B", "Qwen2.5-72B", "Mixtral-8x22B"
NAMES = {f"{LLAMA}-Instruct": LLAMA, f"{QWEN}-Instruct": QWEN, f"{MIXTRAL}-Instruct-v0.1": MIXTRAL}
MIXES = {"(512, 128)": "512-128", "(1024, 128)": "1024-128", "(2048, 128)": "2048-128", "ShareGPT": "sharegpt"}
CHUNKS = {MIXTRAL: 4096}  # tokens of a step in figure 12
CHUNK = 2048  # of the other models


@dataclass(frozen=True)
class Key:
    """A bar or a point of a figure. x: prompt tokens, rows, or the name of a mix. chunk_tokens: of figures 12 and 13.
    mode: ours, or in figures 4 and 10 the column of the CSV file."""

    figure: str
    model: str
    ranks: int
    x: int | str
    mode: str
    chunk_tokens: int = 0


Row = tuple[str, int, int | str, tuple[float, float, float]]  # model, ranks, x, by the columns of MODES
FIGURE_11: tuple[Row, ...] = (
    (LLAMA, 8, 1024, (53.7, 41.9, 46.2)),
    (LLAMA, 8, 8192, (356.0, 289.5, 279.8)),
    (LLAMA, 8, 65536, (3917.7, 3338.3, 3282.4)),
    (QWEN, 8, 8192, (358.5, 292.6, 288.4)),
    (MIXTRAL, 8, 8192, (230.7, 195.6, 199.4)),
    (LLAMA, 4, 8192, (609.6, 531.5, 529.5)),
    (QWEN, 4, 8192, (621.9, 544.8, 535.6)),
)
FIGURE_12: tuple[Row, ...] = (
    (LLAMA, 8, "2048-128", (19399, 24123, 23388)),
    (LLAMA, 8, "sharegpt", (11389, 14188, 13374)),
    (QWEN, 8, "sharegpt", (11218, 13929, 13127)),
    (MIXTRAL, 8, "sharegpt", (10355, 12061, 11384)),
    (LLAMA, 4, "sharegpt", (8141, 9223, 8739)),
    (QWEN, 4, "sharegpt", (7906, 8935, 8506)),
)
FIGURE_13: dict[int, Row] = {  # by chunk
    1024: (LLAMA, 8, "sharegpt", (10884, 13456, 12954)),
    2048: (LLAMA, 8, "sharegpt", (11435, 14215, 13374)),
    4096: (LLAMA, 8, "sharegpt", (11808, 14758, 13715)),
    8192: (LLAMA, 8, "sharegpt", (12048, 15096, 13948)),
}
FIGURE_4: dict[int, dict[str, float]] = {  # by rows of 8192 bf16
    256: {"torch_all_reduce_us": 66.5, "multimem_all_reduce_us": 28.1, "fused_arln_us": 30.1, "full_rms_norm_us": 11.9},
    8192: {
        "torch_all_reduce_us": 646.1,
        "multimem_all_reduce_us": 500.2,
        "fused_arln_us": 502.3,
        "full_rms_norm_us": 184.2,
    },
}
FIGURE_10: dict[int, dict[int, float]] = {  # by rows of 8192 bf16 and CTAs
    256: {2: 61.2, 4: 42.0, 8: 33.7, 16: 30.1},
    8192: {2: 1571.1, 4: 913.8, 8: 561.7, 16: 503.5},
}


def quoted() -> dict[Key, float]:
    """The figures above."""
    found = dict(of_rows("11", FIGURE_11))
    found |= {key: value for row in FIGURE_12 for key, value in of_rows("12", [row], CHUNKS.get(row[0], CHUNK))}
    found |= {key: value for chunk, row in FIGURE_13.items() for key, value in of_rows("13", [row], chunk)}
    for rows, by_column in FIGURE_4.items():
        found |= {Key("4", "", 8, rows, column): value for column, value in by_column.items()}
    for rows, by_ctas in FIGURE_10.items():
        found |= {Key("10", "", 8, rows, f"fused_arln_us_ctas_{ctas}"): value for ctas, value in by_ctas.items()}
    return with_figure_1(found)


def of_rows(figure: str, rows: list[Row] | tuple[Row, ...], chunk: int = 0) -> Iterator[tuple[Key, float]]:
    for model, ranks, x, values in rows:
        for mode, value in zip(MODES.values(), values, strict=True):
            yield Key(figure, model, ranks, x, mode, chunk), float(value)


def with_figure_1(found: dict[Key, float]) -> dict[Key, float]:
    """Figure 1 is the part of figure 11's baseline that goes with the all-reduces."""
    offs = [key for key in found if (key.figure, key.mode) == ("11", "off")]
    shares = {
        Key("1", key.model, key.ranks, key.x, "off"): 1 - found[Key("11", key.model, key.ranks, key.x, "nocomm")] / off
        for key in offs
        if (off := found[key])
    }
    return found | shares


# -- the published files ----------------------------------------------------------------------------------------------


def published(folder: Path | None) -> dict[Key, float]:
    """What is quoted; and all of what the CSV files in `folder` hold, under the artifact's names or with `tokenweave_`
    before them. Raises FileNotFoundError or ValueError, in one line."""
    found = quoted()
    if folder is None:
        return found
    if not folder.is_dir():
        raise FileNotFoundError(f"--reference: {folder} is no folder; give the one with the published CSV files")
    files = sorted(path for path in folder.glob("*figure_*.csv"))
    if not files:
        raise FileNotFoundError(f"--reference: {folder} holds no figure_*.csv of the published artifact")
    for path in files:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                found |= dict(of_file(path.stem.rpartition("figure_")[2], list(csv.DictReader(file))))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"--reference: {path} is not as published: {error!r}") from error
    return with_figure_1(found)


def of_file(number: str, rows: list[dict[str, str]]) -> Iterator[tuple[Key, float]]:
    """number: what its name says, such as 4, 11b or 11a_llama_tp8. Other figures than ours hold nothing for us."""
    figure, part = (number[:2], number[2:3]) if number[:2].isdecimal() else (number[:1], "")
    ranks = 4 if part == "b" else 8
    for row in rows:
        if figure in ("4", "10"):
            yield from of_kernels(figure, row)
        if figure == "11":
            yield from of_modes(Key("11", NAMES[row["model"]], ranks, int(row["prompt_len"]), ""), row)
        if figure == "12":
            model = NAMES[row["model"]]
            chunk = CHUNKS.get(model, CHUNK)
            yield from of_modes(Key("12", model, ranks, MIXES[row["experiment"]], "", chunk), row)
        if figure == "13":
            chunk = int(row["chunk_size"])
            yield from of_modes(Key("13", LLAMA, 8, MIXES[row["experiment"]], "", chunk), row)


def of_kernels(figure: str, row: Mapping[str, str]) -> Iterator[tuple[Key, float]]:
    rows = int(row["BL" if figure == "4" else "num_tokens"])
    for column, value in row.items():
        if column.endswith("_us") or "_ctas_" in column:
            yield Key(figure, "", 8, rows, column), float(value)


def of_modes(key: Key, row: Mapping[str, str]) -> Iterator[tuple[Key, float]]:
    for column, mode in MODES.items():
        yield Key(key.figure, key.model, key.ranks, key.x, mode, key.chunk_tokens), float(row[column])
