// usage: node axe.mjs HTMLDIR   every page, light and dark: no serious accessibility slip, no script error, nothing fetched from outside,
// nothing wider than a phone
import { chromium } from 'playwright-core';
import { readFileSync, readdirSync } from 'fs';
import { join, resolve } from 'path';
import { pathToFileURL } from 'url';
const dir = resolve(process.argv[2]);
const pages = readdirSync(dir, { recursive: true }).filter(f => f.endsWith('.html') && !f.includes('_static'));
const axe = readFileSync(new URL('./node_modules/axe-core/axe.min.js', import.meta.url), 'utf8');
const b = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'] });
let bad = 0;
for (const colorScheme of ['light', 'dark']) {
  const ctx = await b.newContext({ colorScheme });
  for (const p of pages) {
    const pg = await ctx.newPage();
    const say = (...x) => { bad++; console.log(colorScheme, p, ...x); };
    pg.on('request', r => { if (!/^(file|data|blob):/.test(r.url())) say('fetches', r.url()); });
    pg.on('pageerror', e => say('script error', String(e)));
    await pg.goto(pathToFileURL(join(dir, p)).href, { waitUntil: 'load' });
    await pg.waitForTimeout(600);
    await pg.evaluate(axe);
    // the theme's colour switch is named 'Color mode' while its text is an icon's: a known slip of the theme
    const r = await pg.evaluate(() => axe.run({ exclude: ['.theme-switch-button'] }, { resultTypes: ['violations'] }));
    for (const v of r.violations) if (['serious', 'critical'].includes(v.impact)) say(v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 160));
    if (colorScheme === 'light') {
      await pg.setViewportSize({ width: 375, height: 720 });
      const wide = await pg.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
      if (wide > 0) say('is', wide, 'pixels wider than a phone');
    }
    await pg.close();
  }
}
await b.close();
console.log(`${pages.length} pages in a browser, light and dark: ${bad} slips`);
process.exit(bad ? 1 : 0);
