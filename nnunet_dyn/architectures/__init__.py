"""Networks. Every class here can be named in a plans file by its dotted path."""
