// What a reload keeps: one record in IndexedDB, replaced in one transaction, so that it is the old one or the new one.

const DATABASE = "convgrad-digits";
const STORE = "trainings";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older database open"));
  });
}

async function transact(mode, action) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = action(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
      transaction.onerror = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** @param {string} key @returns {Promise<any>} undefined when there is none */
export const loadRecord = (key) => transact("readonly", (store) => store.get(key));

/** @param {string} key @param {any} record */
export const saveRecord = (key, record) => transact("readwrite", (store) => store.put(record, key));

/** @param {string} key */
export const deleteRecord = (key) => transact("readwrite", (store) => store.delete(key));
