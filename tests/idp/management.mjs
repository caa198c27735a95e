// Walks Lacre's Management API with the client that Logto publishes (npm @logto/api), which knows nothing of Lacre.
//
// Environment: LACRE_URL, LACRE_CLIENT_ID, LACRE_CLIENT_SECRET, LACRE_RESOURCE; LACRE_USER, a user with a stored set
// at LACRE_TARGET; LACRE_CONNECTOR, a configuration for a new connector (JSON). Prints one line of JSON: for each step
// its status and what the client made of the body.
import { createManagementApi } from "@logto/api/management";

const { LACRE_URL, LACRE_CLIENT_ID, LACRE_CLIENT_SECRET, LACRE_RESOURCE, LACRE_USER, LACRE_TARGET } = process.env;
const { apiClient, clientCredentials } = createManagementApi("default", {
  clientId: LACRE_CLIENT_ID,
  clientSecret: LACRE_CLIENT_SECRET,
  baseUrl: LACRE_URL,
  apiIndicator: LACRE_RESOURCE,
});

const steps = {};

async function step(name, asked) {
  const { data, error, response } = await asked;
  steps[name] = { status: response.status, body: data ?? error ?? null };
  return data;
}

async function users() {
  const body = { username: "by_the_client", name: "By the client" };
  const made = await step("createUser", apiClient.POST("/api/users", { body }));
  const path = { userId: made?.id };
  await step("getUser", apiClient.GET("/api/users/{userId}", { params: { path } }));
  await step("listUsers", apiClient.GET("/api/users"));
  const renamed = { params: { path }, body: { name: "Another name" } };
  await step("updateUser", apiClient.PATCH("/api/users/{userId}", renamed));
  await step("createSubjectToken", apiClient.POST("/api/subject-tokens", { body: { userId: made?.id } }));
  return path;
}

async function identities({ userId }) {
  const at = "/api/users/{userId}/identities/{target}";
  const path = { userId, target: LACRE_TARGET };
  const identity = { userId: "idp-by-the-client", details: { id: "idp-by-the-client" } };
  await step("putIdentity", apiClient.PUT(at, { params: { path }, body: identity }));
  await step("putIdentityAgain", apiClient.PUT(at, { params: { path }, body: identity }));
  await step("getIdentity", apiClient.GET(at, { params: { path } }));
  await step("deleteIdentity", apiClient.DELETE(at, { params: { path } }));
  await step("getIdentityThatIsGone", apiClient.GET(at, { params: { path } }));
}

async function secrets() {
  const path = { userId: LACRE_USER, target: LACRE_TARGET };
  const query = { includeTokenSecret: "true" };
  const shown = await step(
    "getSecret",
    apiClient.GET("/api/users/{userId}/identities/{target}", { params: { path, query } }),
  );
  const all = { params: { path: { userId: LACRE_USER }, query } };
  await step("allIdentities", apiClient.GET("/api/users/{userId}/all-identities", all));
  const secret = { params: { path: { id: shown?.tokenSecret?.id } } };
  await step("deleteSecret", apiClient.DELETE("/api/secrets/{id}", secret));
  await step("deleteSecretAgain", apiClient.DELETE("/api/secrets/{id}", secret));
}

async function connectors() {
  const body = {
    connectorId: "oauth2",
    config: JSON.parse(process.env.LACRE_CONNECTOR),
    metadata: { target: "by-the-client", name: { en: "By the client" } },
    enableTokenStorage: true,
  };
  const made = await step("createConnector", apiClient.POST("/api/connectors", { body }));
  const params = { path: { id: made?.id } };
  await step("getConnector", apiClient.GET("/api/connectors/{id}", { params }));
  await step("listConnectors", apiClient.GET("/api/connectors"));
  await step("factories", apiClient.GET("/api/connector-factories"));
  const off = { params, body: { enableTokenStorage: false } };
  await step("updateConnector", apiClient.PATCH("/api/connectors/{id}", off));
  await step("deleteConnector", apiClient.DELETE("/api/connectors/{id}", { params }));
  await step("getConnectorThatIsGone", apiClient.GET("/api/connectors/{id}", { params }));
}

async function applications() {
  const body = { name: "By the client", type: "MachineToMachine", customClientMetadata: { allowTokenExchange: true } };
  const made = await step("createApplication", apiClient.POST("/api/applications", { body }));
  const params = { path: { id: made?.id } };
  await step("getApplication", apiClient.GET("/api/applications/{id}", { params }));
  await step("listApplications", apiClient.GET("/api/applications"));
  await step("deleteApplication", apiClient.DELETE("/api/applications/{id}", { params }));
}

async function settings() {
  await step("getAccountCenter", apiClient.GET("/api/account-center"));
  const body = { enabled: true, fields: { social: "ReadOnly" } };
  await step("updateAccountCenter", apiClient.PATCH("/api/account-center", { body }));
  const params = { path: { keyType: "private-keys" } };
  await step("oidcKeys", apiClient.GET("/api/configs/oidc/{keyType}", { params }));
}

const user = await users();
await identities(user);
await secrets();
await connectors();
await applications();
await settings();
await step("deleteUser", apiClient.DELETE("/api/users/{userId}", { params: { path: user } }));
await step("getUserThatIsGone", apiClient.GET("/api/users/{userId}", { params: { path: user } }));
const { scope } = await clientCredentials.getAccessToken();
console.log(JSON.stringify({ scope, steps }));
