"""What docs say that code knows too is what the code says."""

from pathlib import Path

from flux_ft.adapters.formats import support_table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_what_tools_drop_is_current():
    told = (DOCS / "lora_files.md").read_text(encoding="utf-8")
    assert support_table().strip() in told, "write support_table() into docs/lora_files.md again"
