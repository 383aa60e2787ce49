"""URLs of a site that has the status page and no admin, under a namespace of the site's own."""

from django.urls import include, path

urlpatterns = [
    path("ops/", include(([path("db/", include("django_proxysql.monitoring.urls"))], "ops"))),
]
