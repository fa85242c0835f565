"""The server: OpenAI's interface over HTTP, one thread that steps the engine, asyncio beside it."""
