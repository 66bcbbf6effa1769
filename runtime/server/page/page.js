// The page of the server. It asks for a key if the server requires one, and shows the state of the connection.

import { Recognition } from "./connection.js";
import { Controls, complain, find, show } from "./controls.js";
import { FileRecognition } from "./upload.js";

const KEY = "u2moe-api-key";
const key = () => sessionStorage.getItem(KEY);
let models = []; // models of the server
const controls = new Controls(recognise, recogniseFile);

const askForModels = () => fetch("v1/models", { headers: key() ? { Authorization: `Bearer ${key()}` } : {} });

// Offer a choice of models if there are several.
function offer(found) {
  models = found ?? [];
  const chosen = find("model").value;
  find("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
  find("model-field").hidden = models.length < 2;
}

async function askForKey() {
  let answer;
  while ((answer = await askForModels()).status === 401) {
    const dialog = find("key-dialog");
    find("key-wrong").hidden = !key();
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "ok") return false;
    sessionStorage.setItem(KEY, find("key").value.trim());
  }
  offer((await answer.json()).data);
  return true;
}

// Return the options for the server except hotwords. If English is the model's only language, results have digits and sentence
// case.
function asked() {
  const { id, languages } = models.find((model) => model.id === find("model").value) ?? {};
  return { model: id, written: languages?.length === 1 && languages[0] === "en", key: key() };
}

async function connected(make) {
  try {
    if (!(await askForKey())) return null;
  } catch {
    complain("The server does not answer. Is it running?");
    return null;
  }
  return make();
}

function recognise(hotwords, on) {
  return connected(() => new Recognition({ hotwords, ...asked(), on: { ...on, state } }));
}

function recogniseFile(file, hotwords, on) {
  return connected(() => new FileRecognition(file, { hotwords, ...asked(), on }));
}

function state(name, seconds) {
  if (name === "connected") {
    complain("");
    if (controls.microphone) show("live", "Listening");
    else show("busy", "Recognising");
    return;
  }
  const [reason, until] = name === "full" ? ["The server is full", "there is room"] : ["The connection was lost", "it is back"];
  complain(`${reason}. Speech is kept, and sent as soon as ${until}.`);
  show("lost", `Trying again in ${Math.ceil(seconds)} s`);
}

find("key-cancel").onclick = () => find("key-dialog").close();
askForModels().then(async (answer) => answer.ok && offer((await answer.json()).data), () => {});
controls.ready();
