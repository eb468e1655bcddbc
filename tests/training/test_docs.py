"""docs/training.md against the code: every key and default, the examples, the records, the table of the plan."""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from benchmarks import plan
from qwen2vl.media.options import OPTION_NAMES, Limits
from qwen2vl.training import config as configs
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.data import DataEntry, read_examples
from qwen2vl.training.stages import STAGES
from tests.training.data_files import make_processor, png

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
TABLES = {
    "[model]": configs.ModelConfig,
    "[run]": configs.RunConfig,
    "[optimizer]": configs.OptimizerConfig,
    "[parallel]": configs.ParallelConfig,
    "[lora]": configs.LoraConfig,
}
EXAMPLES = dict(re.findall(r"```toml\n# stage: (\w+)\n(.*?)```", TEXT, re.DOTALL))


def documented(table: str) -> dict[str, str]:
    """Key to default, as the table below a heading says."""
    section = TEXT.split(f"### `{table}`\n")[1].split("\n#")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {key: default.strip() for keys, default in rows for key in re.findall(r"`(\w+)`", keys)}


def written(field) -> str:
    """A default as TOML has it."""
    if field.default is MISSING and field.default_factory is MISSING:
        return "*required*"
    value = field.default
    if value is None:
        return "–"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def test_every_table_is_documented():
    assert {"[[data]]", "[limits]", *TABLES} == set(re.findall(r"### `(\[+\w+\]+)`", TEXT))
    kinds = {f"[{f.name}]" for f in fields(TrainingConfig) if f.name != "data"}
    assert kinds == {"[limits]", *TABLES}


def test_every_limit_is_named():
    section = TEXT.split("### `[limits]`\n")[1].split("\n#")[0]
    assert set(re.findall(r"`(\w+)`", section)) == {f.name for f in fields(Limits)} | {"max_characters"}


@pytest.mark.parametrize("table", TABLES)
def test_every_key_and_default_is_documented(table):
    want = {f.name: written(f).replace("1e-05", "1e-5").replace("1e-08", "1e-8") for f in fields(TABLES[table])}
    assert documented(table) == want


def test_every_key_of_data_is_documented():
    want = {f.name: written(f) for f in fields(DataEntry) if f.name != "options"}
    assert documented("[[data]]") == want | dict.fromkeys(OPTION_NAMES, "–")


@pytest.mark.parametrize("stage", STAGES)
def test_the_examples_are_read(stage, tmp_path):
    (tmp_path / "run.toml").write_text(EXAMPLES[stage])
    config = TrainingConfig.from_toml(tmp_path / "run.toml")
    assert config.run.output == str(tmp_path / "runs" / stage)
    assert config.data and [DataEntry.from_config(table) for table in config.data]
    assert f"qwen2vl train --stage {stage}" in TEXT or stage == "vision"


def test_there_is_an_example_for_each_stage_and_no_other():
    assert set(EXAMPLES) == set(STAGES)
    assert TEXT.count("```toml") == len(STAGES)


def test_the_records_are_read(tmp_path):
    records = re.findall(r"<!-- (\w+) -->\n```json\n(.*?)```", TEXT, re.DOTALL)
    assert len(records) == TEXT.count("```json") == 3
    processor = make_processor(tmp_path)
    for name in ("sign.png", "a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    taught = []
    for n, (format, record) in enumerate(records):
        path = tmp_path / f"{n}.jsonl"
        path.write_text(record)
        (example,) = read_examples(str(path), processor, format=format)
        assert example.image_grid_thw is not None
        taught.append(processor.decode(example.input_ids[example.labels != -100]))
    for words, said in zip(("No entry.", "The first.", "A lighthouse at dusk."), taught, strict=True):
        assert words in said


def test_the_plan_is_what_the_command_prints():
    table = TEXT.split("<!-- plan: begin -->\n")[1].split("<!-- plan: end -->")[0]
    assert table == plan.report(plan.Recipe())
