"""Drives a headless Chromium in tests, through chromedriver's HTTP interface (WebDriver), without a library."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request

from tests.runs import free_port

CHROMIUM, DRIVER = (shutil.which(name) for name in ('chromium', 'chromedriver'))
_FLAGS = [f'--{flag}' for flag in (
  'headless', 'no-sandbox', 'disable-gpu', 'disable-background-networking', 'disable-component-update', 'disable-sync',
  'disable-extensions', 'no-first-run', 'hide-scrollbars', 'force-device-scale-factor=1')]

KEYS = {'Enter': '\ue007', 'Shift': '\ue008', 'Control': '\ue009', 'Escape': '\ue00c', 'Left': '\ue012',
        'Right': '\ue014'}  # WebDriver's codes


class Browser:
  """A window of the browser."""

  def __init__(self, root):
    self._root = root

  def _call(self, method, path, body=None):
    request = urllib.request.Request(f'{self._root}/{path}', method=method, data=body and json.dumps(body).encode(),
                                     headers={'Content-Type': 'application/json'})
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)['value']

  def open(self, url):
    self._call('POST', 'url', {'url': url})

  def resize(self, width, height=900):
    """Sets the size of the page's area in pixels. The area may be narrower than the narrowest possible window."""
    self._call('POST', 'goog/cdp/execute', {'cmd': 'Emulation.setDeviceMetricsOverride', 'params': {
      'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': width < 600}})

  def dark(self, on):
    features = [{'name': 'prefers-color-scheme', 'value': 'dark' if on else 'light'}]
    self._call('POST', 'goog/cdp/execute', {'cmd': 'Emulation.setEmulatedMedia', 'params': {'features': features}})

  def run(self, script, *arguments):
    """Runs `script` in the page, and returns its result. The script is the body of a JavaScript function."""
    return self._call('POST', 'execute/sync', {'script': script, 'args': list(arguments)})

  def wait(self, script, seconds=60):
    """Runs `script` in the page until its result is true, and returns this result."""
    until = time.monotonic() + seconds
    while not (value := self.run(script)):
      assert time.monotonic() < until, f'not within {seconds} s: {script}'
      time.sleep(0.05)
    return value

  def press(self, *keys):
    """Presses keys together, as a user does; the last one may be a character, the others are modifiers.

    keys: names in KEYS, or single characters.
    """
    values = [KEYS.get(key, key) for key in keys]
    actions = [{'type': 'keyDown', 'value': value} for value in values]
    actions += [{'type': 'keyUp', 'value': value} for value in reversed(values)]
    self._call('POST', 'actions', {'actions': [{'type': 'key', 'id': 'keyboard', 'actions': actions}]})

  def messages(self):
    """Returns all lines of the browser's console since the last call.

    The browser also writes there what the security policy blocks, and what can't be loaded.
    """
    return [entry['message'] for entry in self._call('POST', 'se/log', {'type': 'browser'})]

  def screenshot(self):
    """Returns a PNG of the page's area, in base64."""
    return self._call('GET', 'screenshot')


@contextlib.contextmanager
def browser(profile):
  """Starts a browser with a new profile in the folder `profile`. Yields a Browser, and ends it after the block."""
  port = free_port()
  driver = subprocess.Popen([DRIVER, f'--port={port}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  root = f'http://127.0.0.1:{port}/session'
  try:
    wanted = {'browserName': 'chrome', 'goog:loggingPrefs': {'browser': 'ALL'}, 'goog:chromeOptions': {
      'binary': CHROMIUM, 'args': [*_FLAGS, f'--user-data-dir={profile}']}}
    data = json.dumps({'capabilities': {'alwaysMatch': wanted}}).encode()
    until = time.monotonic() + 30
    while True:
      try:
        request = urllib.request.Request(root, data, {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request, timeout=60) as answer:
          session = json.load(answer)['value']['sessionId']
        break
      except urllib.error.HTTPError:
        raise
      except OSError:
        assert time.monotonic() < until, 'chromedriver does not answer'
        time.sleep(0.05)
    window = Browser(f'{root}/{session}')
    try:
      yield window
    finally:
      urllib.request.urlopen(urllib.request.Request(f'{root}/{session}', method='DELETE'), timeout=30).close()
  finally:
    driver.terminate()
    driver.wait(30)
