"""How the bundled models and the pages of results are made: run from a checkout, in no wheel."""
