// A button that hands a chosen file to the kernel: its name, its size, and its bytes if they are few enough to be sent.
export default {
  render({ model, el }) {
    const input = Object.assign(document.createElement("input"), { type: "file", accept: model.get("accept") })
    const button = Object.assign(document.createElement("button"), { className: "jupyter-button widget-button", textContent: "Choose a file" })
    input.style.display = "none"
    button.style.width = "auto"
    button.onclick = () => input.click()
    input.onchange = async () => {
      const file = input.files[0]
      if (!file) return
      let size = file.size, bytes = new ArrayBuffer(0)
      try { if (size <= model.get("most")) bytes = await file.arrayBuffer() } catch { size = -1 }
      model.set("file", { name: file.name, size, content: new DataView(bytes) })
      model.save_changes()
      input.value = ""
    }
    el.append(button, input)
  },
}
