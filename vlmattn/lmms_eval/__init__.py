"""The way into lmms-eval, which finds them: a chat model and tasks. Nothing else of vlmattn imports this."""
