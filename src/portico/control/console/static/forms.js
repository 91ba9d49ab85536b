// What forms cannot do by themselves. A form with data-passkey="get" or "create" asks for a challenge, lets the
// authenticator sign it, and is sent with the answer in its field "credential". Any other is sent once: the second half of
// a double click would come with a cookie that the answer to the first one, which the browser drops, has replaced.
"use strict";

const toBytes = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));
const toText = (buffer) => btoa(String.fromCharCode(...new Uint8Array(buffer)))
  .replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
const withBytes = (list) => (list || []).map((item) => ({ ...item, id: toBytes(item.id) }));

async function challenge(form) {
  const answer = await fetch(form.dataset.options, {
    method: "POST",
    body: new URLSearchParams({ form_token: form.elements.form_token.value }),
  });
  if (answer.redirected) {
    location.assign(answer.url);
    return null;
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(`${found.detail}. ${found.hint}`);
  return found;
}

async function ask(kind, options) {
  const publicKey = { ...options, challenge: toBytes(options.challenge) };
  if (kind === "create") {
    publicKey.user = { ...options.user, id: toBytes(options.user.id) };
    publicKey.excludeCredentials = withBytes(options.excludeCredentials);
    return navigator.credentials.create({ publicKey });
  }
  publicKey.allowCredentials = withBytes(options.allowCredentials);
  return navigator.credentials.get({ publicKey });
}

function plain(credential) {
  const { response } = credential;
  const found = { clientDataJSON: toText(response.clientDataJSON) };
  for (const name of ["attestationObject", "authenticatorData", "signature", "userHandle"]) {
    if (response[name]) found[name] = toText(response[name]);
  }
  if (response.getTransports) found.transports = response.getTransports();
  return {
    id: credential.id, rawId: toText(credential.rawId), type: credential.type, response: found,
    authenticatorAttachment: credential.authenticatorAttachment,
    clientExtensionResults: credential.getClientExtensionResults(),
  };
}

const REASONS = {
  InvalidStateError: "This authenticator has a passkey for your account already.",
  NotAllowedError: "No passkey was used: it was cancelled, took too long, or there is none here.",
  SecurityError: "Passkeys do not work at this address.",
};

async function send(event) {
  const form = event.target;
  const said = form.querySelector("[role=alert]");
  event.preventDefault();
  if (form.dataset.busy) return;
  form.dataset.busy = "yes";
  said.textContent = "";
  try {
    const options = await challenge(form);
    if (options === null) return;
    form.elements.credential.value = JSON.stringify(plain(await ask(form.dataset.passkey, options)));
    form.submit();
  } catch (error) {
    said.textContent = REASONS[error.name] || error.message;
    delete form.dataset.busy;
  }
}

function once(event) {
  if (event.target.dataset.busy) event.preventDefault();
  event.target.dataset.busy = "yes";
}

for (const form of document.forms) {
  if (!form.dataset.passkey) {
    form.addEventListener("submit", once);
  } else if (window.PublicKeyCredential) {
    form.hidden = false;
    form.addEventListener("submit", send);
    for (const other of document.querySelectorAll(`[data-shown-with="${form.id}"]`)) other.hidden = false;
  }
}
// A page that comes back from the cache of "back" must work again.
window.addEventListener("pageshow", () => {
  for (const form of document.forms) delete form.dataset.busy;
});
