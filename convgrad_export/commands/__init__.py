"""The subcommands of `convgrad`, one module each, with a function `register` that adds it to the application."""
