// Package peer is the one place that decides whether a TLS peer is who it says it is.
//
// An X509-SVID is verified only with the bundle of the trust domain it names; bundles are never pooled.
// Every TLS configuration made here is TLS 1.3 only, unless [Intermediate] has it speak TLS 1.2 as well, issues no session tickets, and verifies in
// [tls.Config.VerifyConnection], which also runs on a resumed session. The curves are left to crypto/tls, whose
// default is the hybrid X25519MLKEM768.
//
// Certificates, bundles and permissions are asked for at each handshake, so a change bites on the next connection;
// [Registry] carries it to the connections that are already open.
package peer
