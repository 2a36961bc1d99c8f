"""A picture of each position embedding and the table of them (``fope gallery|methods``)."""
