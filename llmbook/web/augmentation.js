// The augmentation viewer without a kernel: the same changes as in Python, on the same random numbers.
window.llmbookAugment = window.llmbookAugment || (() => {
  const dice = seed => {                   // a counter in steps of 2^32/φ, and MurmurHash3's last step as a hash of it
    let state = seed >>> 0;
    return () => {
      state = (state + 0x9e3779b9) >>> 0;
      let x = state;
      x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
      x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
      return ((x ^ (x >>> 16)) >>> 0) / 4294967296;
    };
  };
  const below = (draw, n) => Math.floor(draw() * n);
  const draws = (draw, n) => Array.from({length: n}, draw);
  const shuffled = (draw, n) => {
    const order = [...Array(n).keys()];
    for (let i = n - 1; i > 0; i--) {
      const j = below(draw, i + 1);
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  };

  const changes = {                        // ids 0…n−1 → ids; n is the mask, n + 1 + i a second copy of word i
    "mask": (ids, share, draw) => ids.map(i => draw() < share ? ids.length : i),
    "delete": (ids, share, draw) => {
      const lot = draws(draw, ids.length), kept = ids.filter(i => lot[i] >= share);
      return kept.length ? kept : [below(draw, ids.length)];
    },
    "insert": (ids, share, draw) => {
      const n = ids.length, lot = draws(draw, n + 1), which = draws(draw, n + 1);
      return [...ids, null].flatMap((id, k) => [...(lot[k] < share ? [n + 1 + Math.floor(which[k] * n)] : []), ...(id === null ? [] : [id])]);
    },
    "swap": (ids, share, draw) => {
      const out = [...ids], n = ids.length, times = share && n > 1 ? Math.max(1, Math.floor(share * n)) : 0;
      for (let k = 0; k < times; k++) {
        const i = below(draw, n), j = (i + 1 + below(draw, n - 1)) % n;
        [out[i], out[j]] = [out[j], out[i]];
      }
      return out;
    },
    "reverse": (ids, share, draw) => {
      const n = share ? Math.min(ids.length, Math.max(2, Math.floor(share * ids.length))) : 0, start = below(draw, ids.length - n + 1);
      return [...ids.slice(0, start), ...ids.slice(start, start + n).reverse(), ...ids.slice(start + n)];
    },
    "permute sentences": (ids, share, draw, ends) => {
      const sentences = [[]];
      ids.forEach((id, k) => {
        if (k && ends[k - 1] && !ends[k]) sentences.push([]);
        sentences.at(-1).push(id);
      });
      return shuffled(draw, sentences.length).flatMap(k => sentences[k]);
    },
    "rotate": (ids, share, draw) => {
      const start = below(draw, ids.length);
      return [...ids.slice(start), ...ids.slice(0, start)];
    },
  };

  const split = text => text.match(/[^ \t\n\r]+/g) || [];
  const codes = (text, operation, percent, seed) => {
    const words = split(text), ends = words.map(w => /[.!?]["')]*$/.test(w));
    return words.length ? changes[operation]([...words.keys()], percent / 100, dice(seed), ends) : [];
  };

  const escape = t => t.replace(/[&<>"']/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"}[c]));
  const box = (words, code) => {
    const n = words.length, i = code < n ? code : code - n - 1;
    const [hue, what] = i >= 0 ? [`hsl(${i * 47 % 360} 70% 50% / .28)`, words[i]] : ["hsl(0 0% 50% / .35)", "[mask]"];
    const title = code === n ? "hidden" : code > n ? `added, a copy of word ${i + 1}` : `word ${i + 1}`;
    return `<span title="${title}" style="background:${hue};border-radius:3px;padding:1px 3px;margin:1px;display:inline-block${code > n ? ";outline:1px dashed" : ""}">${escape(what)}</span>`;
  };
  const boxes = (text, operation, percent, seed) => {
    const words = split(text), out = codes(text, operation, percent, seed), left = new Set(out);
    const gone = words.filter((w, i) => !left.has(i)), stayed = out.filter((c, k) => c === k && k < words.length).length;
    const line = `${words.length} words, ${stayed} in their old place${gone.length ? `; gone: ${gone.join(", ")}` : ""}`;
    return `<div style="line-height:2">${out.map(c => box(words, c)).join(" ")}</div><p class="llmbook-caption">${escape(line)}</p>`;
  };

  const mount = root => {
    if (root.dataset.mounted) return;
    root.dataset.mounted = "yes";
    const controls = [...root.querySelectorAll("textarea, select, input")], [area, operation, percent, seed] = controls;
    const redraw = () => {
      for (const slider of [percent, seed]) slider.parentElement.querySelector("output").textContent = slider.value;
      percent.disabled = ["permute sentences", "rotate"].includes(operation.value);
      root.querySelector(".llmbook-changed").innerHTML = boxes(area.value, operation.value, Number(percent.value), Number(seed.value));
    };
    for (const control of controls) control.addEventListener("input", redraw);
    redraw();
  };

  return {mountAll: () => document.querySelectorAll(".llmbook-augment").forEach(mount), codes, boxes};
})();
window.llmbookAugment.mountAll();
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", window.llmbookAugment.mountAll);
