//! The command line: `check`, `send`, `sink`, `--version`, `--help`.
