"""Methods and seeds in; trained and evaluated cells, their table, curves and intervals out."""
