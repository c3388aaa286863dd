"""The shape of the seed's question: one object for all requests, whose answer depends on those before."""

from flask import Flask, flash, render_template_string

from counter_server import SharedState

PAGE = "{{ get_flashed_messages() | join }}"


class SomeObj:
    """Counts how often it was asked, from where it was told to begin."""

    def __init__(self, param: int) -> None:
        self.param = param

    def query(self) -> int:
        self.param += 1
        return self.param


app = Flask(__name__)
app.secret_key = "for tests only"
shared = SharedState(app)

# global_obj = SomeObj(0)
global_obj = shared.object("global_obj", SomeObj, 0)


@app.route("/")
def home() -> str:
    flash(str(global_obj.query()))
    return render_template_string(PAGE)


if __name__ == "__main__":
    app.run()
