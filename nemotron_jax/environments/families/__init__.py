"""One family of tasks a file: how they are drawn, their sessions, their oracle and cheats."""
