// Keeps the page for use without a network. The model is kept by the module itself, which compares its digests.

const VERSION = '{{ version }}';
const FILES = {{ files }};
const NAME = `page-${VERSION}`;

addEventListener('install', (event) => {
  const files = FILES.map((file) => new Request(file, { cache: 'no-cache' })); // else the browser may answer with old ones
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(files)).then(() => skipWaiting()));
});

addEventListener('activate', (event) => {
  const forget = async () => {
    const names = await caches.keys();
    await Promise.all(names.filter((name) => name.startsWith('page-') && name !== NAME).map((name) => caches.delete(name)));
    await clients.claim();
  };
  event.waitUntil(forget());
});

addEventListener('fetch', (event) => {
  const { request } = event;
  const isModel = request.url.startsWith(new URL('model/', registration.scope).href);
  if (request.method !== 'GET' || isModel || new URL(request.url).origin !== location.origin) return;
  const answer = async () => (await (await caches.open(NAME)).match(request, { ignoreSearch: true })) ?? fetch(request);
  event.respondWith(answer());
});
