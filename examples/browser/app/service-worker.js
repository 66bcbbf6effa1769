// Caches the page for offline use. The module caches the model itself, and verifies the digests of its files.

const VERSION = '{{ version }}';
const FILES = {{ files }};
const NAME = `page-${VERSION}`;

addEventListener('install', (event) => {
  const files = FILES.map((file) => new Request(file, { cache: 'no-cache' })); // otherwise the browser may return stale files
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
