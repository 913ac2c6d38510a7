"""Tasks of tool use by kind, judged by the state that is left behind, and the suite of them."""
