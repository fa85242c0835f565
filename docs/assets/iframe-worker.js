// Browsers start no Worker for a page that is opened as a file (file://…). This puts one in its place that runs the
// same script in a hidden frame, so that the search works without a server. Over http nothing is changed.
// The class must have this name: the theme's search asks for it.
if (location.protocol === "file:") {
  window.IFrameWorker = class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.title = "search"
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      inside.document.open() // some browsers replace an empty frame's document later, this one they keep
      inside.document.write("<!doctype html><title>search</title><body></body>")
      inside.document.close()
      this.ready = new Promise((resolve, reject) => {
        const script = inside.document.createElement("script")
        script.src = new URL(url, location.href).href
        script.onload = () => resolve(inside)
        script.onerror = () => reject(new Error(`cannot load ${script.src}`))
        // What the script posts comes out of this object, as from a worker.
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        inside.document.body.appendChild(script)
      })
    }

    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {}
  }
  window.Worker = window.IFrameWorker
}
