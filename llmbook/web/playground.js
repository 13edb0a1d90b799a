// The tokenizer playground without a kernel: the same tokenizers as in Python, on the vocabularies that ride in the page.
window.llmbookPlayground = window.llmbookPlayground || (() => {
  const utf8 = new TextEncoder(), text8 = new TextDecoder("utf-8");

  const words = m => text => (text.match(new RegExp(m.pattern, "gu")) || []).map(w => m.ids.get(w) ?? m.unknown);

  const mergeWord = (m, ids, below) => {   // the pair of lowest rank first, until none below the limit is left
    for (;;) {
      let best = below, at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const rank = m.rank.get(ids[i] * 65536 + ids[i + 1]);
        if (rank !== undefined && rank < best) { best = rank; at = i; }
      }
      if (at < 0) return ids;
      ids.splice(at, 2, m.made[best]);
      m.used?.add(best);
    }
  };

  const bpe = m => (text, below = Infinity) =>
    (text.match(new RegExp(m.pattern, "gu")) || []).flatMap(w => mergeWord(m, [...utf8.encode(w)].map(b => m.bytes[b]), below));

  const clean = (m, text) => {             // SentencePiece's default rule; nothing for the others
    if (m.normalization !== "nmt_nfkc") return text;
    const first = [...text].map(c => c === "\uff5e" ? "\u{f0000}" : m.first.has(c) ? m.first.get(c) : c).join("");
    const trimmed = first.normalize("NFKC").replaceAll("\u{f0000}", "\uff5e").replace(/ +/g, " ").replace(/^ +| +$/g, "");
    return trimmed ? " " + trimmed : "";
  };

  const viterbi = (m, word) => {
    const cs = [...word], best = [0, ...cs.map(() => -Infinity)], came = [0, ...cs.map(() => 0)];
    for (let i = 0; i < cs.length; i++) {
      let piece = "";
      for (let j = i + 1; j <= Math.min(cs.length, i + m.longest); j++) {
        piece += cs[j - 1];
        const s = m.score.get(piece) ?? (j === i + 1 ? m.low : undefined);
        if (s !== undefined && best[i] + s > best[j]) { best[j] = best[i] + s; came[j] = i; }
      }
    }
    const cut = [];
    for (let end = cs.length; end; end = came[end]) cut.unshift(cs.slice(came[end], end).join(""));
    return cut;
  };

  const unigram = m => text => {
    const ids = (clean(m, text).match(/ [^ ]*|[^ ]+/g) || []).flatMap(w => viterbi(m, w)).flatMap(p =>
      m.ids.has(p) ? [m.ids.get(p)] : m.byteIds ? [...utf8.encode(p)].map(b => m.byteIds[b]) : [m.unknown]);
    return ids.filter((id, k) => id !== m.unknown || ids[k - 1] !== id);
  };

  const ready = m => {
    const bytes = new Map(m.pieces.map((p, i) => [i, typeof p === "string" ? utf8.encode(p) : Uint8Array.from(p)]));
    m.show = id => id === m.unknown ? m.unknownName : text8.decode(bytes.get(id) || new Uint8Array());
    if (m.kind === "words") { m.ids = new Map(m.pieces.map((p, i) => [p, i])); m.encode = words(m); }
    if (m.kind === "bpe") {
      m.rank = new Map(m.merges.map(([a, b], r) => [a * 65536 + b, r]));
      m.encode = bpe(m);
    }
    if (m.kind === "unigram") {
      m.first = new Map(m.first);
      const plain = m.pieces.map((p, i) => [p, i]).filter(([p]) => typeof p === "string");
      m.ids = new Map(plain);
      m.score = new Map(plain.map(([p, i]) => [p, m.scores[i]]));
      m.longest = Math.max(...plain.map(([p]) => [...p].length));
      m.encode = unigram(m);
    }
    return m;
  };

  const steps = (m, text) => {             // the ranks that a text's encoding uses, in order
    m.used = new Set();
    m.encode(text);
    const used = [...m.used].sort((a, b) => a - b);
    m.used = null;
    return used;
  };

  const escape = t => t.replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
  const boxes = (m, ids) => ids.map((id, n) => `<span title="id ${id}" style="background:hsl(${n * 47 % 360} 70% 50% / .28);border-radius:3px;padding:1px 2px;margin:1px;display:inline-block">${
    escape(m.show(id).replaceAll(" ", "·").replaceAll("\n", "⏎"))}</span>`).join("");

  const mount = root => {
    if (root.dataset.mounted) return;
    root.dataset.mounted = "yes";
    const models = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    for (const name in models) ready(models[name]);
    root.models = models;
    const [area, method, step] = ["textarea", "select", "input"].map(s => root.querySelector(s)), out = step.parentElement.querySelector("output");
    const redraw = moved => {
      const m = models[method.value], text = area.value;
      step.parentElement.hidden = m.kind !== "bpe";
      let ids = m.encode(text), said = "";
      if (m.kind === "bpe") {
        const used = steps(m, text);
        step.max = used.length;
        if (moved !== step) step.value = used.length;
        const k = Number(step.value);
        ids = m.encode(text, k ? used[k - 1] + 1 : 0);
        const half = side => m.show(m.merges[used[k - 1]][side]).replaceAll(" ", "·");
        said = k ? `${half(0)} + ${half(1)}, merge ${used[k - 1] + 1}` : "bytes, nothing merged yet";
        out.textContent = `${k} of ${used.length}: ${said}`;
        step.setAttribute("aria-valuetext", out.textContent);
      }
      root.querySelector(".llmbook-tokens").innerHTML = boxes(m, ids);
      root.querySelector(".llmbook-counts").innerHTML = "<tr><th>method</th><th>tokens</th><th>bytes per token</th><th>unknown</th></tr>" + Object.entries(models).map(([name, o]) => {
        const all = o.encode(text);
        return `<tr><td>${escape(name)}</td><td>${all.length}</td><td>${all.length ? (utf8.encode(text).length / all.length).toFixed(2) : "–"}</td><td>${all.filter(i => i === o.unknown).length}</td></tr>`;
      }).join("");
    };
    for (const el of [area, method, step]) el.addEventListener("input", () => redraw(el));
    redraw(null);
  };

  const mountAll = () => document.querySelectorAll(".llmbook-playground").forEach(mount);
  return {mountAll, encode: (root, name, text, below) => root.models[name].encode(text, below)};
})();
window.llmbookPlayground.mountAll();
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", window.llmbookPlayground.mountAll);
