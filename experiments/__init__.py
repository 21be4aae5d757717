"""The paper's figures and tables, one file per experiment: `python -m experiments list`."""
