// Requests to the server that this page comes from, and the events of a streamed answer.

/** A request that the server has refused, or an answer that it could not end: one line, and its status. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The one model that is served. */
export async function model(key) {
  const response = await reach("v1/models", {headers: authorization(key)});
  return (await response.json()).data[0];
}

/**
 * The chunks of a streamed answer, each as soon as it has come. body: JSON text. The server ends a text whose
 * reader goes, so aborting the signal stops it.
 */
export async function* chunks(path, body, key, signal) {
  const headers = {"content-type": "application/json", ...authorization(key)};
  const response = await reach(path, {method: "POST", headers, body, signal});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const {done, value} = await reader.read().catch(error => {
      if (error.name === "AbortError") throw error;
      return {done: true};
    });
    if (done) throw new ServerError("the answer broke off: does the server still run?");
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
}

function authorization(key) {
  return key ? {authorization: `Bearer ${key}`} : {};
}

async function reach(path, options) {
  const whole = {credentials: "omit", cache: "no-store", referrerPolicy: "no-referrer", ...options};
  let response;
  try {
    response = await fetch(path, whole);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server cannot be reached: does it still run?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ServerError(said?.error?.message ?? `the server answered with status ${response.status}`, response.status);
}
