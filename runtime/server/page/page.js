// The page of the server: asks for a key where the server wants one, and says what has become of the connection.

import { Recognition } from "./connection.js";
import { Controls, complain, find, show } from "./controls.js";
import { FileRecognition } from "./upload.js";

const KEY = "u2moe-api-key";
const key = () => sessionStorage.getItem(KEY);
let models = []; // of the server
const controls = new Controls(recognise, recogniseFile);

const askForModels = () => fetch("v1/models", { headers: key() ? { Authorization: `Bearer ${key()}` } : {} });

// Where there are several, one is chosen.
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

// What is asked of the server besides hotwords: English as people write it, if that is the language.
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
  const [reason, until] = name === "full" ? ["The server is full", "there is room"] : ["The connection is lost", "it is back"];
  complain(`${reason}. What you say is kept, and sent as soon as ${until}.`);
  show("lost", `Trying again in ${Math.ceil(seconds)} s`);
}

find("key-cancel").onclick = () => find("key-dialog").close();
askForModels().then(async (answer) => answer.ok && offer((await answer.json()).data), () => {});
controls.ready();
