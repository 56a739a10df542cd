"""The paper's evidence in small: its tables and figures on models and pictures that anybody can have."""
