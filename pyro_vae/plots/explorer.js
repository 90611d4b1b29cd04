// The page of pyro_vae.plots.explore: axes and colours, the decoder, clicks, and the download.
const explorer = (() => {
  const HIT = 9;  // maximum distance in pixels between a click and its row
  const NAMED = 40;  // maximum number of columns in the plot: those farthest from the model
  let page;  // models of Bokeh, arrays and texts from Python
  let current = 0;  // the row shown last; the decoder uses its context

  // --- The decoder -------------------------------------------------------------------------------------------------
  const sigmoid = v => 1 / (1 + Math.exp(-v));
  const softplus = (v, beta, threshold) => beta * v > threshold ? v : Math.log1p(Math.exp(beta * v)) / beta;
  const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

  const LAYERS = {
    Linear: (v, {weight, bias}) => Float64Array.from({length: weight.length / v.length}, (_, row) => {
      let sum = bias ? bias[row] : 0;
      for (let i = 0, at = row * v.length; i < v.length; i++) sum += weight[at + i] * v[i];
      return sum;
    }),
    LayerNorm: (v, {eps, weight, bias}) => {
      const mean = v.reduce((a, b) => a + b) / v.length;
      const root = Math.sqrt(v.reduce((a, b) => a + (b - mean) ** 2, 0) / v.length + eps);
      return v.map((one, i) => (one - mean) / root * (weight ? weight[i] : 1) + (bias ? bias[i] : 0));
    },
    First: (v, {count}) => v.slice(0, count),
    StandardizeFrom: (v, {first, center, unit}) =>
      v.map((one, i) => i < first ? one : (one - center[i - first]) / unit[i - first]),
    ReLU: v => v.map(one => Math.max(one, 0)),
    Tanh: v => v.map(Math.tanh),
    Sigmoid: v => v.map(sigmoid),
    SiLU: v => v.map(one => one * sigmoid(one)),
    Softplus: (v, {beta, threshold}) => v.map(one => softplus(one, beta, threshold)),
    LeakyReLU: (v, {negative_slope}) => v.map(one => one > 0 ? one : negative_slope * one),
    ELU: (v, {alpha}) => v.map(one => one > 0 ? one : alpha * Math.expm1(one)),
  };

  // The mean of a feature, where number(k) is the k-th output of the network for this feature.
  const MEANS = {
    location: number => number(0),
    Bernoulli: number => sigmoid(number(0)),
    Binomial: (number, {total_count}) => total_count * sigmoid(number(0)),
    ContinuousBernoulli: number => {
      const h = number(0) / 2;
      return 0.5 + 0.5 * (Math.abs(h) < 0.01 ? h / 3 - h ** 3 / 45 : 1 / Math.tanh(h) - 1 / h);
    },
    Poisson: number => Math.exp(Math.min(number(0), 20)),
    NegativeBinomial: number => Math.exp(clamp(number(1), -20, 20) + clamp(number(0), -Infinity, 20)),
    ZeroInflated: (number, {counts}) => sigmoid(-number(0)) * MEANS[counts.mean](k => number(k + 1), counts),
    Categorical: (number, {levels}) => {
      let best = 0;
      for (let level = 1; level < levels; level++) if (number(level) > number(best)) best = level;
      return best;
    },
  };

  // Decode latents z in a context: the mean of each feature, or the code of the most probable category.
  function decode(z, context = [], decoder = page.decoder) {
    const {layers, heads, center, unit} = decoder;
    let v = Float64Array.from([...z, ...context]);
    for (const layer of layers) v = LAYERS[layer.op](v, layer);
    const mean = [];
    for (const head of heads) {
      for (let j = 0; j < head.size; j++) mean.push(MEANS[head.mean](k => v[head.at + k * head.size + j], head));
    }
    return Float64Array.from(mean, (one, j) => center ? center[j] + unit[j] * one : one);
  }

  // --- Arrays of rows ----------------------------------------------------------------------------------------------
  // Copies to plain lists, since slices of Bokeh's arrays return the whole array.
  const row = (array, i) => Array.from({length: array.shape[1]}, (_, j) => array[i * array.shape[1] + j]);
  const column = (array, j) => Array.from({length: array.shape[0]}, (_, i) => array[i * array.shape[1] + j]);
  const values = choice => choice.values ?? column(page[choice.array], choice.column);
  const axes = () => [page.x_axis, page.y_axis].map(select => page.choices[Number(select.value)]);
  const dot = (a, b) => a.reduce((sum, one, i) => sum + one * b[i], 0);

  // --- Axes and colours --------------------------------------------------------------------------------------------
  function place() {
    const [x, y] = axes();
    page.rows.data = {...page.rows.data, x: [...values(x)], y: [...values(y)]};
    [page.figure.below[0].axis_label, page.figure.left[0].axis_label] = [x.title, y.title];
    page.mark.data = {x: [], y: []};
    for (const range of [page.figure.x_range, page.figure.y_range]) range.reset();
  }

  const escaped = text => String(text).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);

  function colour() {
    const choice = page.choices[Number(page.colour.value)], shown = [...values(choice)];
    const kinds = choice.classes?.length <= page.palette.length ? choice.classes : null;  // else shaded by code
    const known = shown.filter(Number.isFinite).sort((a, b) => a - b);
    const quantile = share => known[Math.round(share * (known.length - 1))];
    const low = quantile(0.02), high = quantile(0.98), last = page.scale.length - 1;
    const shade = v => page.scale[Math.round(clamp((v - low) / (high - low || 1), 0, 1) * last)];
    const pick = (v, of_class, of_number, missing) => !Number.isFinite(v) ? missing : kinds ? of_class[v] : of_number(v);
    page.rows.data = {
      ...page.rows.data,
      fill: shown.map(v => pick(v, page.palette, shade, page.missing)),
      marker: shown.map(v => pick(v, page.markers, () => "circle", "x")),
    };
    const gaps = known.length < shown.length;
    const entry = (fill, sign, name) => `<span style="color:${fill};font-size:130%">${sign}</span> ${escaped(name)}`;
    const entries = (kinds ?? []).map((name, i) => entry(page.palette[i], page.signs[i], name));
    if (gaps) entries.push(entry(page.missing, "✕", "missing"));
    const shaded = choice.classes ? `${choice.classes.length} values, shaded in order; ` : "";
    if (!kinds && known.length) entries.unshift(`(${shaded}the scale runs from the 2nd to the 98th percentile)`);
    page.legend.text = `<b>${escaped(choice.title)}</b> &ensp; ${entries.join(" &ensp; ")}`;
    page.bar.visible = !kinds && known.length > 0;
    if (page.bar.visible) Object.assign(page.bar.color_mapper, {low, high: high > low ? high : low + 1});
  }

  // --- Clicks ------------------------------------------------------------------------------------------------------
  const show_mark = (x, y, marker) => { page.mark.data = {x: [x], y: [y]}; page.mark_glyph.marker = {value: marker}; };

  const short = (value, digits) => Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : "–";

  // Round a value to the second significant digit of its spread.
  function rounded(value, spread) {
    const decimals = 1 - Math.floor(Math.log10(spread));
    if (!Number.isFinite(value) || !(Math.abs(decimals) <= 8)) return short(value, 3);
    return decimals > 0 ? value.toFixed(decimals) : String(Math.round(value * 10 ** decimals) / 10 ** decimals);
  }

  const named = (j, code) => page.columns[j].classes?.[Math.round(code)];

  function draw_picture(source, pixels) {
    const [channels, height, width] = page.image_shape, out = source.data.image[0], [low, high] = page.limits;
    const level = (k, at) => clamp(255 * (pixels[k * height * width + at] - low) / (high - low || 1), 0, 255);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = y * width + x, shade = k => channels === 1 ? 255 - level(0, at) : level(k, at);
        const rgb = [0, 1, 2].map(k => Math.round(shade(k)));
        out[(height - 1 - y) * width + x] = (255 << 24 | rgb[2] << 16 | rgb[1] << 8 | rgb[0]) >>> 0;
      }
    }
    source.change.emit();
  }

  const levels = bytes => Array.from(bytes, one => page.limits[0] + one * (page.limits[1] - page.limits[0]) / 255);

  // Show the columns of the model, beside those of a row if there is one; own is NaN at missing values.
  function show_columns(mean, own = null, sd = [], chance = []) {
    const {center, unit} = page.spread, numbers = [];
    const lines = [["column", "model: mean", "the row", "sd of x", "(row − mean) / sd"]];
    page.columns.forEach(({name}, j) => {
      const off = own ? (own[j] - mean[j]) / sd[j] : NaN, sure = chance[j];
      const model = named(j, mean[j]) ?? rounded(mean[j], sd[j]);
      lines.push([
        name,
        Number.isFinite(sure) ? `${model} (probability ${rounded(sure, 0.1)})` : model,
        own ? named(j, own[j]) ?? short(own[j], 6) : "",
        short(sd[j], 2),
        Number.isFinite(off) ? off.toFixed(1) : "–",
      ]);
      const far = Math.abs(Number.isFinite(off) ? off : (mean[j] - center[j]) / unit[j]);
      if (!page.columns[j].classes && unit[j] > 0) numbers.push({name, j, far});
    });
    page.table.text = table_of(own ? lines : lines.map(line => line.slice(0, 2)));
    const farthest = new Set([...numbers].sort((a, b) => b.far - a.far).slice(0, NAMED).map(({j}) => j));
    draw_columns(numbers.filter(({j}) => farthest.has(j)), mean, own ?? mean.map(() => NaN), sd);
  }

  function table_of([head, ...lines]) {
    const line = (cells, tag) => `<tr>${cells.map(text => `<${tag}>${escaped(text)}</${tag}>`).join("")}</tr>`;
    return `<table>${line(head, "th")}${lines.map(cells => line(cells, "td")).join("")}</table>`;
  }

  // Plot columns in standardized units (over the rows).
  function draw_columns(drawn, mean, own, sd) {
    const {center, unit} = page.spread, column = drawn.map(({name}) => name);
    const standard = (array, sign = 0) => drawn.map(({j}) => (array[j] + sign * (sd[j] || 0) - center[j]) / unit[j]);
    page.beside_figure.y_range.factors = [...column].reverse();
    page.beside.data = {
      column, own: standard(own), mean: standard(mean), low: standard(mean, -1), high: standard(mean, 1),
    };
  }

  function show_row(i) {
    current = i;
    page.about.text = page.words[i];
    show_mark(page.rows.data.x[i], page.rows.data.y[i], "circle");
    const own = row(page.x, i), mean = row(page.mean, i);
    if (page.image_shape) {
      [page.left.title.text, page.right.title.text] = ["the row", "its reconstruction (mean)"];
      draw_picture(page.left_source, levels(own));
      draw_picture(page.right_source, levels(mean));
    } else {
      show_columns(mean, own, row(page.sd, i), page.probability ? row(page.probability, i) : []);
    }
  }

  // Return the latents with these coordinates nearest to the mean over the rows; null if neither axis is a latent.
  function latents_at(x, y) {
    const along = axes().map((axis, i) => ({...axis, at: [x, y][i]})).filter(axis => axis.direction);
    let z = Float64Array.from(page.middle);
    const before = [];  // orthonormal directions in which z is fixed already
    for (const {direction, offset, at} of along) {
      let free = Float64Array.from(direction);
      for (const one of before) free = free.map((v, k) => v - dot(direction, one) * one[k]);
      const length = Math.sqrt(dot(free, free));
      if (length < 1e-9) continue;  // the same axis twice
      const step = (at + offset - dot(direction, z)) / dot(direction, free);
      z = z.map((v, k) => v + step * free[k]);
      before.push(free.map(v => v / length));
    }
    return along.length ? z : null;
  }

  // Return the nearest point that was decoded in advance; null if the grid does not span the axes.
  function stored_at(x, y) {
    const at = [page.x_axis, page.y_axis].map(select => Number(select.value)), {axes: own, places, decoded} = page.grid;
    const order = own.map(axis => at.indexOf(axis));
    if (order.includes(-1)) return null;
    const target = order.map(k => [x, y][k]);
    let best = 0, least = Infinity;
    for (let i = 0; i < places.shape[0]; i++) {
      const far = row(places, i).reduce((sum, one, k) => sum + (one - target[k]) ** 2, 0);
      if (far < least) [best, least] = [i, far];
    }
    const spot = [x, y].map((one, k) => order.includes(k) ? row(places, best)[order.indexOf(k)] : one);
    return {mean: page.image_shape ? levels(row(decoded, best)) : row(decoded, best), spot};
  }

  function show_place(x, y) {
    const z = latents_at(x, y), context = page.context ? row(page.context, current) : [];
    const here = () => z && {mean: decode(z, context), spot: [x, y]};
    const found = page.decoder ? here() : stored_at(x, y);
    if (!found) {
      page.about.text = page.decoder ? page.sentences.no_latent : page.sentences.no_grid;
      return;
    }
    const coordinates = axes().map((axis, i) => axis.direction && `${axis.name} = ${short(found.spot[i], 3)}`);
    page.about.text = `Decoded at ${coordinates.filter(Boolean).join(", ")}. ${page.sentences.decoded}`;
    show_mark(...found.spot, "cross");
    Object.assign(page, {latents: z, decoded: found.mean});
    if (page.image_shape) {
      [page.left.title.text, page.right.title.text] = ["the row shown last", "decoded (mean)"];
      draw_picture(page.right_source, found.mean);
    } else {
      show_columns(found.mean);
    }
  }

  function click(x, y) {
    const {x_range, y_range, inner_width, inner_height} = page.figure, {x: xs, y: ys} = page.rows.data;
    const across = inner_width / (x_range.end - x_range.start), up = inner_height / (y_range.end - y_range.start);
    let best = -1, least = HIT;
    xs.forEach((one, i) => {
      const far = Math.hypot((one - x) * across, (ys[i] - y) * up);
      if (far < least) [best, least] = [i, far];
    });
    if (best >= 0) show_row(best); else show_place(x, y);
  }

  // --- Brushing and downloading ------------------------------------------------------------------------------------
  const brushed = () => [...page.rows.selected.indices].sort((a, b) => a - b);
  const chosen = () => brushed().length ? brushed() : page.words.map((_, i) => i);

  function count() {
    const which = brushed().length ? "the selected" : "all";
    page.download.label = `Download ${which} ${chosen().length} rows (CSV)`;
  }

  // Format with the fewest digits that round-trip in single precision.
  function digits(value) {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "" : String(value);
    if (Math.fround(value) !== value) return String(value);
    const few = p => Number(value.toPrecision(p));
    return String([1, 2, 3, 4, 5, 6, 7, 8, 9].map(few).find(short => Math.fround(short) === value));
  }

  function csv() {
    const quoted = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const columns = page.download_columns.map(choice => ({...choice, shown: values(choice)}));
    const cell = ({shown, classes}, i) =>
      classes && Number.isFinite(shown[i]) ? String(classes[shown[i]]) : digits(shown[i]);
    const lines = chosen().map(i => [page.rows.data.row[i], ...columns.map(one => cell(one, i))]);
    const all = [["row", ...columns.map(one => one.name)], ...lines];
    return all.map(line => line.map(quoted).join(",") + "\n").join("");
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
    link.download = "rows.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function start(given) {
    page = given;
    place();
    colour();
    count();
    show_row(0);
  }

  return {start, place, colour, click, count, download, decode, show_row, show_place, state: () => page};
})();
