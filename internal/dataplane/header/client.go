package header

import (
	"encoding/base64"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
)

// Forwarding reports whether a field belongs to proxies that an application trusts: where
// a request came from, with which certificate and as whom, or which method and URL count
// in place of the request's own. Clients without an SVID and callers of other domains may
// say nothing of the kind. Case does not count, and every sign is "-" (see fold).
func Forwarding(name string) bool {
	name = fold(name)
	for _, p := range forwardingPrefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	_, ok := forwarding[name]
	return ok
}

var forwardingPrefixes = []string{
	prefix, "x-forwarded", "forwarded", "x-original-", "x-rewrite-", "client-cert", "x-client-cert", "x-client-verify", "x-ssl-", "ssl-client-",
	"x-arr-", "x-envoy-", "x-amzn-mtls-", "x-amzn-oidc-", "x-auth-request-", "x-goog-authenticated-user-",
	"x-ms-client-principal", "tailscale-user-",
	"x-accel-", "x-sendfile-", "x-http-method", "x-method-override", "x-override-",
}

var forwarding = set("x-forward", "via", "proxy", // Proxy is HTTP_PROXY to a CGI program
	"x-real-ip", "x-client-ip", "client-ip", "true-client-ip", "x-true-client-ip", "x-cluster-client-ip", "x-remote-ip", "x-remote-addr", "x-originating-ip",
	"cf-connecting-ip", "cf-connecting-ipv6", "fastly-client-ip", "x-azure-clientip", "x-proxyuser-ip", "x-appengine-user-ip",
	"x-host", "x-http-host-override", "x-url-scheme", "x-scheme", "front-end-https",
	"x-http-path-override", "x-http-destinationurl", "x-request-uri", "request-uri", "x-script-name", "script-name",
	"remote-user", "x-remote-user", "x-remote-groups", "x-webauth-user", "x-authenticated-user", "x-authenticated-userid", "x-credential-username", "cf-access-authenticated-user-email")

// Credential reports whether a field of a request shows who its sender is by a secret.
// Case does not count, and every sign is "-" (see fold).
func Credential(name string) bool {
	_, ok := credentials[fold(name)]
	return ok
}

var credentials = set("authorization", "proxy-authorization", "x-authorization", "cookie", "cookie2", "dpop",
	"api-key", "apikey", "x-api-key", "x-apikey", "ocp-apim-subscription-key", "x-goog-api-key", "x-functions-key", "x-rapidapi-key",
	"auth-token", "x-auth-token", "access-token", "x-access-token", "id-token", "x-id-token", "x-session-token", "x-session-id", "x-auth-key",
	"x-token", "x-jwt-token", "x-jwt", "x-jwt-assertion", "private-token", "job-token", "x-vault-token", "x-amz-security-token", "x-consul-token",
	"x-goog-iap-jwt-assertion", "cf-access-jwt-assertion", "cf-access-token", "workload-identity-token", "workload-proof-token", "txn-token",
	webSocketProtocol)

// webSocketProtocol is where browsers put a token, as they can set no other field of a
// WebSocket. It is a credential only as far as it has one.
const webSocketProtocol = "sec-websocket-protocol"

// QueryCredential is Credential for a parameter of the query (RFC 6750 section 2.3).
func QueryCredential(name string) bool {
	_, ok := queryCredentials[strings.Trim(fold(name), "-")]
	return ok
}

var queryCredentials = set("access-token", "id-token", "refresh-token", "auth-token", "bearer-token", "authorization", "jwt",
	"api-key", "apikey", "x-api-key", "subscription-key", "x-amz-security-token", "x-amz-signature", "x-amz-credential")

// RemoveForwarding deletes the fields of [Forwarding], in headers and trailers alike.
func RemoveForwarding(h http.Header) {
	for name := range h {
		if Forwarding(name) {
			delete(h, name)
		}
	}
}

// RemoveCredentials deletes the fields of [Credential] but those in keep, and whatever else
// has token, the sender's own, in it. In headers and trailers alike; no token: "".
func RemoveCredentials(h http.Header, token string, keep ...string) {
	for name, values := range h {
		switch plain := fold(name); {
		case slices.ContainsFunc(keep, func(k string) bool { return strings.EqualFold(k, name) }):
		case plain == webSocketProtocol:
			if left := subprotocols(values, token); len(left) > 0 {
				h[name] = []string{strings.Join(left, ", ")}
			} else {
				delete(h, name)
			}
		case plain == "referer":
			for i, value := range values {
				page, query, _ := strings.Cut(value, "?")
				if left := RemoveQueryCredentials(query, token); left != query {
					values[i] = strings.TrimSuffix(page+"?"+left, "?")
				}
			}
			if hasToken(values, token) {
				delete(h, name)
			}
		case Credential(name), hasToken(values, token):
			delete(h, name)
		}
	}
}

func hasToken(values []string, token string) bool {
	return token != "" && slices.ContainsFunc(values, func(v string) bool { return strings.Contains(v, token) })
}

// subprotocols are those of the list that are no token, nor announce one.
func subprotocols(values []string, token string) (left []string) {
	announced := false
	for _, value := range values {
		for part := range strings.SplitSeq(value, ",") {
			part = textproto.TrimString(part)
			lower := strings.ToLower(part)
			switch {
			case part == "":
			case announced || isToken(part) || hasToken([]string{part}, token):
				announced = false
			case slices.Contains([]string{"bearer", "token", "authorization", "access_token", "access-token", "jwt", "id_token"}, lower):
				announced = true // the next one is the token
			case strings.Contains(lower, "bearer"), strings.HasPrefix(lower, "authorization"), strings.HasPrefix(lower, "token"),
				strings.HasPrefix(lower, "access_token"), strings.HasPrefix(lower, "access-token"):
			default:
				left = append(left, part)
			}
		}
	}
	return left
}

// isToken recognises a JWS or JWE, also as the end of a longer word.
func isToken(s string) bool {
	i := strings.Index(s, "eyJ") // base64url of an object's beginning
	if i < 0 {
		return false
	}
	head, _, found := strings.Cut(s[i:], ".")
	if !found {
		return len(s)-i > 64 // a JSON object of that length, in base64
	}
	_, err := base64.RawURLEncoding.DecodeString(head)
	return err == nil
}

// RemoveQueryCredentials takes the parameters of [QueryCredential] but those in keep out
// of a query, and whatever else has token in it, and leaves every other byte as it is.
func RemoveQueryCredentials(query, token string, keep ...string) string {
	if query == "" {
		return ""
	}
	// For some applications ";" separates as well.
	var b strings.Builder
	separator, changed := byte(0), false
	for rest := query; ; {
		end := strings.IndexAny(rest, "&;")
		part := rest
		if end >= 0 {
			part = rest[:end]
		}
		name, value, _ := strings.Cut(part, "=")
		name, value = unescape(name), unescape(value)
		// Some read name[] and blanks around a name as the name.
		name, _, _ = strings.Cut(textproto.TrimString(name), "[")
		if (QueryCredential(name) || hasToken([]string{name, value}, token)) && !slices.ContainsFunc(keep, func(k string) bool { return strings.EqualFold(k, name) }) {
			changed = true
		} else {
			if separator != 0 && b.Len() > 0 {
				b.WriteByte(separator)
			}
			b.WriteString(part)
		}
		if end < 0 {
			break
		}
		separator, rest = rest[end], rest[end+1:]
	}
	if !changed {
		return query
	}
	return b.String()
}

// unescape decodes a part of a query, if it can be.
func unescape(s string) string {
	if plain, err := url.QueryUnescape(s); err == nil {
		return plain
	}
	return s
}

// Keep returns the values of those fields, to be put back after [RemoveHop]: a client
// cannot take its own credentials away from a service by naming them in Connection.
func Keep(h http.Header, names []string) http.Header {
	var kept http.Header
	for _, name := range names {
		name = http.CanonicalHeaderKey(name)
		if values := h[name]; len(values) > 0 {
			if kept == nil {
				kept = http.Header{}
			}
			kept[name] = values
		}
	}
	return kept
}

func set(names ...string) map[string]struct{} {
	m := make(map[string]struct{}, len(names))
	for _, name := range names {
		m[name] = struct{}{}
	}
	return m
}

// fold is name as the most careless of applications reads it: in lower case, with "-" for
// every sign (CGI makes each of them "_"), without what gRPC's gateway takes off.
func fold(name string) string {
	plain := strings.Map(func(c rune) rune {
		switch {
		case 'A' <= c && c <= 'Z':
			return c + 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
			return c
		}
		return '-'
	}, name)
	return strings.TrimPrefix(plain, "grpc-metadata-")
}
