"""The paper's theory as functions, and measured on trained models: `fope spectrum`."""
