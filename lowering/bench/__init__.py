"""``quant2e bench``: programs timed side by side, each in a fresh process."""
