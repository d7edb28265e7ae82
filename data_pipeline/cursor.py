"""Where a run stands in its data. No rank is in it: any number of ranks continues with exactly the next sample."""

from pydantic import Field

from armillary.table import Table


class Cursor(Table):
    """The next sample of the global order, and how much of it is packed already."""

    sample: int = Field(0, ge=0, description="the next global sample")
    carry: int = Field(0, ge=0, description="input positions of that sample which an earlier row has taken")
