"""betarank explore: a page that shows, token by token, what an objective did to a model.

    figures.py   what a checkpoint predicts at each token of a few texts
    views.py     what the page shows: a text, continuations of it, a problem with verdicts
    page.py      the page, served or exported as one file; its parts are in assets/
    server.py    serves the page to this machine only
    command.py   the command line
"""
