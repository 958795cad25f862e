"""The way into lmms-eval: a chat model and tasks. lmms-eval finds them; nothing else of vlmattn imports this package."""
