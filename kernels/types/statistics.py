"""The columns of a row's statistics, as the `filter_rows` op gives them."""

STAT_MAX, STAT_THRESHOLD, STAT_LOG_NORMALISER, STAT_ERROR = range(4)
