"""Charts as inline SVG.

They are written by hand and not by a plotting library, because their colours have to follow the page (dark, light,
print), their text has to stay text, and a report has to be made where only torch is installed.
"""

from cheapgrad.reporting.charts.bars import draw_bars
from cheapgrad.reporting.charts.dots import draw_dots
from cheapgrad.reporting.charts.frame import Series
from cheapgrad.reporting.charts.scatter import Point, draw_scatter_chart

__all__ = ["Point", "Series", "draw_bars", "draw_dots", "draw_scatter_chart"]
