"""Where a run stands in its data. No rank is in it: any number of ranks continues with exactly the next row."""

from pydantic import Field

from armillary.table import Table


class Cursor(Table):
    """The next row: its block of the global order, and its number among the block's packed rows."""

    block: int = Field(0, ge=0, description="block of the global order, see mixture.py")
    row: int = Field(0, ge=0, description="the next row of that block; those before it are used up")
