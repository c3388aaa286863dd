"""gunicorn's settings. A name that its version does not know yet is passed over, which an option is not."""

control_socket_disable = True  # it would stand in the user's home
