"""Columns of the sums of a row, as the loops fill them; `bounds.RowSums` names them."""

ERROR, NORM, BOUND, DOT, QUARTIC, ALONG, LARGEST_ERROR, AMAX, BEYOND, LOST, ODD = range(11)
COLUMNS = 11
