"""`counter-server demo`: one small app behind real servers, with the common ways to share a number."""
